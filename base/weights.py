"""Fine-tuned weights on disk, in the formats of diffusers: finetune.py writes, generate.py loads.

    unit/pytorch_lora_weights.safetensors   LoRA, for `load_lora_weights`
    unit/unet/                              DreamBooth, for `UNet2DConditionModel.from_pretrained`
    unit/text_encoder/                      if it was trained
    unit/tokens/<word>.safetensors          learned words, for `load_textual_inversion`
"""

import json
import re

from common import files, made, stage
from common.files import InputError

torch = stage.lazy("torch")

LORA_FILE = "pytorch_lora_weights.safetensors"
TOKENS = "tokens"


def save(out, base, method, dtype, text_encoder):
    """Writes the weights of a base.training.Base. dtype: fp32, bf16 or fp16."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for token, embedding in zip(base.tokens, base.learned):
        (out / TOKENS).mkdir(parents=True, exist_ok=True)
        path = out / TOKENS / f"{token.strip('<>')}.safetensors"
        save_file({token: embedding.detach().cpu()}, path)
    if method == "lora":  # the metadata hold alpha: without it diffusers scales the update by 1
        config = {f"unet.{name}": sorted(value) if isinstance(value, set) else value
                  for name, value in base.unet.peft_config["default"].to_dict().items()}
        metadata = {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}
        weights = get_peft_model_state_dict(base.unet)
        StableDiffusionPipeline.save_lora_weights(
            out, {key: value.to(dtype) for key, value in weights.items()}, weight_name=LORA_FILE,
            save_function=lambda weights, path: save_file(weights, path, metadata=metadata))
        return
    parts = {"unet": base.unet} | ({"text_encoder": base.text_encoder} if text_encoder else {})
    for name, part in parts.items():
        part.to(dtype).save_pretrained(out / name)
        part.float()


def read_tokens(unit):
    """{word: embedding, (D,) array} of a unit's learned words."""
    from safetensors.torch import load_file

    return {token: embedding.flatten().float().numpy()
            for path in sorted((unit / TOKENS).glob("*.safetensors"))
            for token, embedding in load_file(path).items()}


def read_draws(folder, base):
    """What finetune.py recorded in MODELS/config.json: what its units can draw, see its publish().

    Raises InputError unless they fit --base.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(path, "not found",
                         "point --models to the output folder of a finished finetune.py")
    config = files.read_json(path)
    try:
        for draw in config["draws"]:
            _check_draw(**draw)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(path, "was not written by finetune.py", "run finetune.py again") from None
    if config.get("base") != files.model_digest(base):
        raise InputError(folder, f"was fine-tuned from another base model than --base {base}",
                         "run finetune.py with this --base")
    return config["draws"]


def _check_draw(unit, key, y, a, suffix, prompt, images):
    """Raises ValueError for what finetune.py does not write: names of folders are made of it."""
    unit_name, suffix_name = r"all|y\d+-a\d+(-c\d+)?", r"(-c\d+)?"
    named = re.fullmatch(unit_name, unit) and re.fullmatch(suffix_name, suffix)
    if not named or type(y) is not int or type(images) is not int or images < 1:
        raise ValueError(unit)
    prompt.replace("", "")


def check(unit, key):
    """Raises InputError unless a unit's folder (or None) is as finetune.py published it."""
    if unit and not made.is_finished(unit, key):
        changed = ", ".join(made.changed_files(unit)) or "the unit"
        raise InputError(unit, f"{changed} was removed or changed since fine-tuning",
                         "run finetune.py again")


def drop(folder):
    """Removes weights, and the config.json that says that they are there; loss curves stay."""
    (folder / "config.json").unlink(missing_ok=True)
    for unit in folder.glob("*/"):
        for name in ("unet", "text_encoder", TOKENS, LORA_FILE):
            files.remove(unit / name)


class Sampler:
    """A base pipeline with DPM-Solver++ (Lu et al. 2022), into which weights are loaded."""

    def __init__(self, pipe):
        from diffusers import DPMSolverMultistepScheduler

        self.pipe = pipe
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="dpmsolver++")
        pipe.set_progress_bar_config(disable=True)
        if pipe.unet.config.sample_size > 32:  # decoding 16 images of 512 pixels takes 10 GB
            pipe.vae.enable_slicing()
        self._tokens = set(pipe.tokenizer.added_tokens_encoder)
        self._own = {}  # copies of the base's weights that a unit's weights have replaced

    def load(self, unit):
        """Loads the weights of a unit's folder, or restores the base's own (None)."""
        from safetensors import SafetensorError

        again = "delete this folder and run finetune.py again"
        lora = bool(unit) and (unit / LORA_FILE).is_file()
        if unit and not lora and not (unit / "unet").is_dir():
            raise InputError(unit, "contains neither a LoRA nor a UNet", again)
        self.pipe.unload_lora_weights()
        if self.pipe.tokenizer.added_tokens_encoder.keys() - self._tokens:
            self.pipe.unload_textual_inversion()
        try:
            self._replace(unit)
            if lora:
                self.pipe.load_lora_weights(unit, weight_name=LORA_FILE)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise InputError(unit, f"cannot be loaded: {files.reason(error)}", again) from None
        if lora and not self.pipe.get_list_adapters():
            raise InputError(unit, "contains no LoRA weights for the UNet of this base model",
                             again)

    def _replace(self, unit):
        """Loads learned words, and a UNet or a text encoder in the place of the base's."""
        from safetensors.torch import load_file

        for path in sorted((unit / TOKENS).glob("*.safetensors")) if unit else ():
            self.pipe.load_textual_inversion(path)
        for name in ("unet", "text_encoder"):
            found = sorted((unit / name).glob("*.safetensors")) if unit else []
            part = getattr(self.pipe, name)
            if found and name not in self._own:
                self._own[name] = {key: value.clone() for key, value in part.state_dict().items()}
            if found:
                part.load_state_dict(load_file(found[0]))
            elif name in self._own:
                part.load_state_dict(self._own[name])
