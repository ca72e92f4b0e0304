"""Loading pretrained models, by folder or hub id: for base/families.py and common/clip.py."""

import warnings
from pathlib import Path

from common import files
from common.files import InputError

# diffusers and transformers take seconds to import, so the functions that need them import them


def load_model(read, name, flag):
    """read(name), a from_pretrained. Raises InputError if the model is missing or incomplete."""
    silence_libraries()
    if name.startswith("base/") and not Path(name).exists():  # else it is taken for a hub id
        raise InputError(f"{flag} {name}", "does not exist",
                         "`make base` trains a base, see README")
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


def check_length(tokenizer, prompt):
    """Raises InputError for a prompt of more tokens than the model takes."""
    length = len(tokenizer(prompt).input_ids)
    if length > tokenizer.model_max_length:
        raise InputError(f"prompt {prompt!r}", f"has {length} tokens, the model takes "
                         f"{tokenizer.model_max_length}", "shorten it")
