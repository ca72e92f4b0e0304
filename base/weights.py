"""Fine-tuned weights on disk, in the formats of diffusers: finetune.py writes, generate.py loads.

    unit/pytorch_lora_weights.safetensors   LoRA, for `load_lora_weights`
    unit/unet/ (or transformer/)            DreamBooth, for `from_pretrained` of its class
    unit/text_encoder/                      if it was trained
    unit/tokens/<word>.safetensors          learned words, for `load_textual_inversion`
"""

import json
import re

from base import families
from common import files, made, stage
from common.files import InputError

torch = stage.lazy("torch")

LORA_FILE = "pytorch_lora_weights.safetensors"
TOKENS = "tokens"
PARTS = ("unet", "transformer", "text_encoder")  # what a DreamBooth may replace


def save(out, base, method, dtype, text_encoder):
    """Writes the weights of a base.training.Base. dtype: fp32, bf16 or fp16."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    denoiser = base.family.denoiser
    for token, embedding in zip(base.tokens, base.learned):
        (out / TOKENS).mkdir(parents=True, exist_ok=True)
        path = out / TOKENS / f"{token.strip('<>')}.safetensors"
        save_file({token: embedding.detach().cpu()}, path)
    if method == "lora":  # the metadata hold alpha: without it diffusers scales the update by 1
        config = {f"{denoiser}.{name}": sorted(value) if isinstance(value, set) else value
                  for name, value in base.network.peft_config["default"].to_dict().items()}
        metadata = {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}
        weights = get_peft_model_state_dict(base.network)
        base.family.pipe.save_lora_weights(
            out, **{f"{denoiser}_lora_layers": {key: value.to(dtype) for key, value
                                                in weights.items()}}, weight_name=LORA_FILE,
            save_function=lambda weights, path: save_file(weights, path, metadata=metadata))
        return
    parts = {denoiser: base.network}
    if text_encoder:
        parts["text_encoder"] = base.family.pipe.text_encoder
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
        for name in (*PARTS, TOKENS, LORA_FILE):
            files.remove(unit / name)


class Sampler:
    """A base pipeline into which weights are loaded.

    Diffusion models draw with DPM-Solver++ (Lu et al. 2022), flow matching with its own solver.
    """

    def __init__(self, family):
        from diffusers import DPMSolverMultistepScheduler

        self.family, self.pipe = family, family.pipe
        if isinstance(family.schedule, families.Diffusion):
            self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(
                self.pipe.scheduler.config, algorithm_type="dpmsolver++")
        self.pipe.set_progress_bar_config(disable=True)
        if family.size > 256:  # decoding 16 images of 512 pixels takes 10 GB
            self.pipe.vae.enable_slicing()
        self._tokens = set(self.pipe.tokenizer.added_tokens_encoder)
        self._own = {}  # copies of the base's weights that a unit's weights have replaced
        self._prompts = {}

    def encode(self, wanted):
        """Encodes prompts, the arguments of family.encode(), before the first unit is loaded.

        Text encoders then make room. Where units bring words or a text encoder of their own,
        prompts are checked alone. Raises InputError for a long one.
        """
        if self.family.learns_text:
            for prompt, *_ in wanted:
                self.family.check(prompt)
            return
        with torch.no_grad():
            self._prompts = {each: self.family.encode(*each) for each in set(wanted)}
        self.family.drop_text_encoders()

    def encoded(self, *wanted):
        """An encoded prompt, by the text encoder of the unit that is loaded."""
        with torch.no_grad():
            return self._prompts.get(wanted) or self.family.encode(*wanted)

    def load(self, unit):
        """Loads the weights of a unit's folder, or restores the base's own (None)."""
        from safetensors import SafetensorError

        again = "delete this folder and run finetune.py again"
        lora = bool(unit) and (unit / LORA_FILE).is_file()
        if unit and not lora and not (unit / self.family.denoiser).is_dir():
            raise InputError(unit, f"contains neither a LoRA nor a {self.family.denoiser}", again)
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
            raise InputError(unit, "contains no LoRA weights for this base model", again)

    def _replace(self, unit):
        """Loads learned words, and a network or a text encoder in the place of the base's."""
        from safetensors.torch import load_file

        for path in sorted((unit / TOKENS).glob("*.safetensors")) if unit else ():
            self.pipe.load_textual_inversion(path)
        for name in PARTS:
            found = sorted((unit / name).glob("*.safetensors")) if unit else []
            part = getattr(self.pipe, name, None)
            if found and name not in self._own:
                self._own[name] = {key: value.clone() for key, value in part.state_dict().items()}
            if found:
                part.load_state_dict({name: value for path in found
                                      for name, value in load_file(path).items()})
            elif name in self._own:
                part.load_state_dict(self._own[name])
