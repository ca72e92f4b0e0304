"""Loading pretrained models, by folder or hub id: Stable Diffusion, and what CLIP needs of it."""

import warnings
from pathlib import Path

from common import files, stage
from common.files import InputError

torch = stage.lazy("torch")
# diffusers and transformers take seconds to import, so the functions that need them import them


def load_model(read, name, flag):
    """read(name), a from_pretrained. Raises InputError if the model is missing or incomplete."""
    silence_libraries()
    try:
        model = read(name)
        _check(model)
        return model
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, HTTP errors, ...
        raise InputError(f"{flag} {name}", f"cannot be loaded: {files.reason(error)}",
                         "give a folder in diffusers layout or, with a network, a hub id") from None


def _check(model):
    """Raises ValueError for weights that are not finite, and for a tokenizer without its files."""
    for part in getattr(model, "components", {"": model}).values():
        if hasattr(part, "named_parameters"):
            for weight, values in part.named_parameters():
                if not values.isfinite().all():
                    raise ValueError(f"its weight {weight} is not finite")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        if set(tokenizer("a photo").input_ids) <= set(tokenizer.all_special_ids):
            raise ValueError("its tokenizer has no vocabulary")


def silence_libraries():
    """Turns off what diffusers and transformers say that a user can do nothing about."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers")


def load_pipeline(name, dtype):
    """Stable Diffusion 1.x or 2.x, its safety checker off: a black image is no training image.

    name: a folder in diffusers layout, with fp16 variants or without, a hub id, or a single
    .safetensors file (with a folder of the same name for its configs if there is no network).
    Whether it predicts noise or velocity is read from the scheduler. Pickles are never read.
    """
    from diffusers import StableDiffusionPipeline

    options = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None,
               "dtype": dtype}

    def read(name):
        if name.endswith(".safetensors"):
            config = Path(name).with_suffix("")
            more = {"config": str(config)} if config.is_dir() else {}
            return StableDiffusionPipeline.from_single_file(name, **options, **more)
        options["use_safetensors"] = True
        try:
            return StableDiffusionPipeline.from_pretrained(name, **options)
        except OSError:
            if not any(Path(name).rglob("*.fp16.safetensors")):
                raise
            return StableDiffusionPipeline.from_pretrained(name, variant="fp16", **options)

    pipe = load_model(read, str(name), "--base")
    if pipe.unet.config.addition_embed_type:
        raise InputError(f"--base {name}", "is a Stable Diffusion XL model",
                         "give a Stable Diffusion 1.x or 2.x")
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise InputError(f"--base {name}", "is an inpainting model", "give a text-to-image model")
    return pipe


def token_ids(tokenizer, prompts):
    """Token ids of prompts, (len(prompts), tokens). Raises InputError for one that is too long."""
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > tokenizer.model_max_length:
            raise InputError(f"prompt {prompt!r}", f"has {length} tokens, the model takes "
                             f"{tokenizer.model_max_length}", "shorten it")
    return tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length,
                     return_tensors="pt").input_ids
