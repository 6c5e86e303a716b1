"""What a mask is made of: sources and routing (spec 4)."""

from pdlightning.masking.masks import Masks, Source
from pdlightning.masking.pgd import PGD
from pdlightning.masking.routing import AllSites, Bernoulli, EachSite, Route, Routing, UniformSubset
from pdlightning.masking.sources import Binomial, Constant, Uniform

__all__ = [
    "PGD",
    "AllSites",
    "Bernoulli",
    "Binomial",
    "Constant",
    "EachSite",
    "Masks",
    "Route",
    "Routing",
    "Source",
    "Uniform",
    "UniformSubset",
]
