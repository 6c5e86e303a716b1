"""Language models to decompose: in-house ones, how they are pretrained, and any model of transformers."""

from pdlightning.targets.language.checks import BelowUnigramEntropy
from pdlightning.targets.language.gpt2_simple import GPT2Simple
from pdlightning.targets.language.huggingface import huggingface_model
from pdlightning.targets.language.llama_simple import LlamaSimple
from pdlightning.targets.language.llama_simple_mlp import LlamaSimpleMLP
from pdlightning.targets.language.recipe import LanguageModelRecipe
from pdlightning.targets.language.training import LanguageModelTraining, next_token_loss, validation_loss

__all__ = [
    "BelowUnigramEntropy",
    "GPT2Simple",
    "LanguageModelRecipe",
    "LanguageModelTraining",
    "LlamaSimple",
    "LlamaSimpleMLP",
    "huggingface_model",
    "next_token_loss",
    "validation_loss",
]
