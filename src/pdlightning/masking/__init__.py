"""What a mask is made of: sources and routing (spec 4)."""

from pdlightning.masking.ascent import AdamAscent, Ascent, SGDAscent, SignAscent
from pdlightning.masking.masks import Masks, Source
from pdlightning.masking.persistent import PersistentPGD
from pdlightning.masking.pgd import PGD
from pdlightning.masking.pool import ParticlePool
from pdlightning.masking.routing import AllSites, Bernoulli, EachSite, Route, Routing, UniformSubset
from pdlightning.masking.sources import Binomial, Constant, Uniform

__all__ = [
    "PGD",
    "AdamAscent",
    "AllSites",
    "Ascent",
    "Bernoulli",
    "Binomial",
    "Constant",
    "EachSite",
    "Masks",
    "ParticlePool",
    "PersistentPGD",
    "Route",
    "Routing",
    "SGDAscent",
    "SignAscent",
    "Source",
    "Uniform",
    "UniformSubset",
]
