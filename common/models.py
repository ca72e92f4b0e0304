"""The pretrained models: Stable Diffusion and CLIP, by folder or hub id, and where and how precisely they run."""

import json
import re
import warnings
from pathlib import Path

from common import files, imagefolder, stage
from common.files import InputError
from common.pixels import Pixels, ahead

np = stage.lazy("numpy")
torch = stage.lazy("torch")
# diffusers, transformers and peft take seconds to import, so the functions that need them import them

LORA_FILE = "pytorch_lora_weights.safetensors"
TOKENS = "tokens"
EMBEDDINGS = "embeddings.npz"  # of data/embed.py

# ------------------------------------------------------------------------------------- device and precision


def add_device_flags(parser, precision=True):
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    if precision:
        parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                            help="auto: bf16 on a GPU that supports it, else fp32")


def pick_device(name):
    """A torch.device: the named one, or with "auto" the best available of cuda, mps, cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError("--device", f"{name} is not available: {str(error).splitlines()[0]}", "try cpu") from None


def use_bf16(precision, device):
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())


# -------------------------------------------------------------------------------------------------- loading


def load_model(read, name, flag):
    """read(name), a from_pretrained. Raises InputError if there is no such model or it is incomplete."""
    silence_libraries()
    try:
        model = read(name)
        for part in getattr(model, "components", {"": model}).values():
            for weight, values in part.named_parameters() if hasattr(part, "named_parameters") else ():
                if not values.isfinite().all():
                    raise ValueError(f"its weight {weight} is not finite")
        tokenizer = getattr(model, "tokenizer", None)  # without its files it loads with an empty vocabulary
        if tokenizer is not None and set(tokenizer("a photo").input_ids) <= set(tokenizer.all_special_ids):
            raise ValueError("its tokenizer has no vocabulary")
        return model
    except Exception as error:  # these loaders raise OSError, ValueError, KeyError, SafetensorError, HTTP errors, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{flag} {name}", f"cannot be loaded: {reason}",
                         "give a folder in diffusers layout or, with a network, a hub id") from None


def silence_libraries():
    """Turns off what diffusers and transformers say that a user can do nothing about: a progress bar for every file, that
    a LoRA has no weights for the text encoder, deprecations inside diffusers."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="diffusers")


def _in_fp32(model_class):
    """A from_pretrained that reads safetensors only, in fp32."""
    return lambda name: model_class.from_pretrained(name, use_safetensors=True, dtype=torch.float32)


def load_pipeline(name, dtype):
    """Stable Diffusion 1.x or 2.x with its safety checker off (a blackened image is no training image).

    name: a folder in diffusers layout, with fp16 variants or without, a hub id, or a single .safetensors file (with a
    folder of the same name for its configs if there is no network). Whether the model predicts noise or velocity is
    read from the scheduler's config. Pickles are never read.
    """
    from diffusers import StableDiffusionPipeline

    off = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}

    def read(name):
        if name.endswith(".safetensors"):
            config = Path(name).with_suffix("")
            options = {"config": str(config)} if config.is_dir() else {}
            return StableDiffusionPipeline.from_single_file(name, dtype=dtype, **off, **options)
        try:
            return StableDiffusionPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True, **off)
        except OSError:
            if not (Path(name).is_dir() and any(Path(name).rglob("*.fp16.safetensors"))):
                raise
            return StableDiffusionPipeline.from_pretrained(name, variant="fp16", dtype=dtype, use_safetensors=True,
                                                           **off)

    pipe = load_model(read, str(name), "--base")
    if pipe.unet.config.addition_embed_type:
        raise InputError(f"--base {name}", "is a Stable Diffusion XL model", "give a Stable Diffusion 1.x or 2.x")
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise InputError(f"--base {name}", "is an inpainting model", "give a text-to-image model")
    return pipe


def token_ids(tokenizer, prompts):
    """Token ids of prompts, (len(prompts), tokens). Raises InputError for a prompt that would be truncated."""
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > tokenizer.model_max_length:
            raise InputError(f"prompt {prompt!r}", f"has {length} tokens, the model takes {tokenizer.model_max_length}",
                             "shorten it")
    return tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length,
                     return_tensors="pt").input_ids


# ------------------------------------------------------------------------------ fine-tuning and sampling


class Base:
    """A base model to be fine-tuned: VAE, text encoder, UNet and noise schedule; bf16: the UNet computes in bfloat16.

    On a GPU the VAE and the text encoder are there only while they are needed.
    """

    def __init__(self, name, device, bf16):
        from diffusers import DDPMScheduler

        self.name, self.device, self.bf16, self.as_loaded = name, device, bf16, True
        pipe = load_pipeline(name, torch.float32)
        self.tokenizer, self.text_encoder, self.vae, self.unet = pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.unet
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.size = self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._embeds, self.tokens, self.learned = {}, [], ()
        for part in (self.text_encoder, self.vae, self.unet):
            part.requires_grad_(False)
        self.unet.to(device)

    def reset(self, method):
        """Restores the base's own weights, before training a unit with lora or dreambooth, which changes all of them."""
        if getattr(self.unet, "peft_config", None):
            self.unet.unload_lora()
        elif method == "dreambooth" and not self.as_loaded:
            self.unet = None  # makes room
            self.__init__(self.name, self.device, self.bf16)
        if method == "lora" and self.bf16:
            self.unet.to(torch.bfloat16)  # frozen weights; LoRA's own are in fp32
        self._embeds.clear()
        self.as_loaded = False

    def encode(self, paths):
        """Mean and std of the latents of images, each (N, 4, h, w) on the CPU, scaled for the UNet."""
        from torchvision.transforms.functional import pil_to_tensor

        def read(paths):
            return torch.stack([pil_to_tensor(imagefolder.load_image(path, self.size)) for path in paths])

        batch, moments = min(16, max(1, 16 * 64**2 // self.size**2)), []  # encoding 16 images of 512 pixels takes 10 GB
        self.vae.to(self.device)
        for pixels in ahead(read, [paths[i:i + batch] for i in range(0, len(paths), batch)]):
            with torch.no_grad():
                posterior = self.vae.encode(pixels.to(self.device) / 127.5 - 1).latent_dist
            moments.append([(part * self.vae.config.scaling_factor).cpu() for part in (posterior.mean, posterior.std)])
        self.vae.to("cpu")
        return [torch.cat(part) for part in zip(*moments)]

    def learn_tokens(self, tokens, word):
        """Adds tokens to the vocabulary. Returns their embeddings, to be trained: (len(tokens), D), all of them the word's."""
        embedding, first = self.text_encoder.get_input_embeddings(), len(self.tokenizer)
        [word], self.tokens = self.tokenizer(word, add_special_tokens=False).input_ids[:1], tokens
        self.tokenizer.add_tokens(tokens)
        if len(self.tokenizer) > embedding.num_embeddings:
            self.text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
            embedding = self.text_encoder.get_input_embeddings().requires_grad_(False)
        self.learned = torch.nn.Parameter(embedding.weight[word].repeat(len(tokens), 1).to(self.device))

        def with_learned(module, inputs, output):
            number = inputs[0] - first
            return torch.where((number >= 0)[..., None], self.learned[number.clamp(min=0)], output)

        embedding.register_forward_hook(with_learned)
        return self.learned

    def prompt_embeds(self, prompts):
        """(len(prompts), tokens, D); computed once per prompt unless the text encoder or a token is being trained."""
        training = bool(self.tokens) or any(weight.requires_grad for weight in self.text_encoder.parameters())
        embeds = {} if training else self._embeds
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in embeds]
        if missing:
            self.text_encoder.to(self.device)
        for prompt in missing:
            tokens = token_ids(self.tokenizer, [prompt]).to(self.device)
            with torch.set_grad_enabled(training):
                embeds[prompt] = self.text_encoder(tokens).last_hidden_state[0]
        if missing and not training:
            self.text_encoder.to("cpu")
        return torch.stack([embeds[prompt] for prompt in prompts])


def save_weights(out, base, method, dtype, text_encoder):
    """Writes fine-tuned weights in the format of diffusers: a LoRA file for `load_lora_weights`, or a folder unet/ for
    `UNet2DConditionModel.from_pretrained` (and text_encoder/); learned tokens in tokens/, a file each for
    `load_textual_inversion`. dtype: fp32, bf16 or fp16."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for token, embedding in zip(base.tokens, base.learned):
        (out / TOKENS).mkdir(parents=True, exist_ok=True)
        save_file({token: embedding.detach().cpu()}, out / TOKENS / f"{token.strip('<>')}.safetensors")
    if method == "lora":  # the metadata hold alpha: without it diffusers scales the update by 1
        config = {f"unet.{name}": sorted(value) if isinstance(value, set) else value
                  for name, value in base.unet.peft_config["default"].to_dict().items()}
        metadata = {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}  # one key: of several the order varies
        StableDiffusionPipeline.save_lora_weights(
            out, {key: value.to(dtype) for key, value in get_peft_model_state_dict(base.unet).items()},
            weight_name=LORA_FILE, save_function=lambda weights, path: save_file(weights, path, metadata=metadata))
        return
    base.unet.to(dtype).save_pretrained(out / "unet")
    base.unet.float()
    if text_encoder:
        base.text_encoder.to(dtype).save_pretrained(out / "text_encoder")
        base.text_encoder.float()


def read_tokens(unit):
    """{token: embedding, (D,) array} of a unit's learned tokens."""
    from safetensors.torch import load_file

    return {token: embedding.flatten().float().numpy() for path in sorted((unit / TOKENS).glob("*.safetensors"))
            for token, embedding in load_file(path).items()}


def read_draws(folder, base):
    """What finetune.py recorded in MODELS/config.json: what its units can draw. Raises InputError unless they fit --base."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(path, "not found", "point --models to the output folder of a finished finetune.py")
    config = files.read_json(path)
    try:
        for draw in config["draws"]:  # unit and suffix become names of folders
            if not (re.fullmatch(r"all|y\d+-a\d+(-c\d+)?", draw["unit"])
                    and re.fullmatch(r"(-c\d+)?", draw["suffix"])
                    and {int} == {type(draw[name]) for name in ("y", "images")} and draw["images"] > 0):
                raise ValueError(draw)
            draw["a"], draw["key"], draw["prompt"].replace("", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(path, "was not written by finetune.py", "run finetune.py again") from None
    if config.get("base") != files.model_digest(base):
        raise InputError(folder, f"was fine-tuned from another base model than --base {base}",
                         "run finetune.py with this --base")
    return config["draws"]


def check_weights(unit, key):
    """Raises InputError unless the weights of a unit, a folder or None, are those that finetune.py published."""
    if unit and not stage.is_published(unit, key):
        changed = ", ".join(stage.changed_files(unit)) or "the unit"
        raise InputError(unit, f"{changed} was removed or changed since fine-tuning", "run finetune.py again")


def drop_weights(folder):
    """Removes fine-tuned weights, and the config.json that says that they are there; loss curves stay."""
    (folder / "config.json").unlink(missing_ok=True)
    for unit in folder.glob("*/"):
        for name in ("unet", "text_encoder", TOKENS, LORA_FILE):
            files.remove(unit / name)


class Sampler:
    """A base pipeline with DPM-Solver++ (Lu et al. 2022) as its sampler, into which fine-tuned weights are loaded."""

    def __init__(self, name, device, bf16):
        from diffusers import DPMSolverMultistepScheduler

        self.pipe = load_pipeline(name, torch.bfloat16 if bf16 else torch.float32).to(device)
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config,
                                                                      algorithm_type="dpmsolver++")
        self.pipe.set_progress_bar_config(disable=True)
        if self.pipe.unet.config.sample_size > 32:  # one image at a time: decoding 16 of 512 pixels takes 10 GB
            self.pipe.vae.enable_slicing()
        self._tokens = set(self.pipe.tokenizer.added_tokens_encoder)
        self._own = {}  # copies of the base's weights that a unit's weights have replaced

    def load(self, weights):
        """Loads a unit's weights (a folder written by save_weights), or restores the base's own (None)."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        again = "delete this folder and run finetune.py again"
        lora = weights and (weights / LORA_FILE).is_file()
        if weights and not lora and not (weights / "unet").is_dir():
            raise InputError(weights, "contains neither a LoRA nor a UNet", again)
        self.pipe.unload_lora_weights()
        if self.pipe.tokenizer.added_tokens_encoder.keys() - self._tokens:
            self.pipe.unload_textual_inversion()
        try:
            for path in sorted((weights / TOKENS).glob("*.safetensors")) if weights else ():
                self.pipe.load_textual_inversion(path)
            for name in ("unet", "text_encoder"):
                found = sorted((weights / name).glob("*.safetensors")) if weights else []
                part = getattr(self.pipe, name)
                if found and name not in self._own:
                    self._own[name] = {key: value.clone() for key, value in part.state_dict().items()}
                if found or name in self._own:
                    part.load_state_dict(load_file(found[0]) if found else self._own[name])
            if lora:
                self.pipe.load_lora_weights(weights, weight_name=LORA_FILE)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise InputError(weights, f"cannot be loaded: {str(error).splitlines()[0]}", again) from None
        if lora and not self.pipe.get_list_adapters():
            raise InputError(weights, "contains no LoRA weights for the UNet of this base model", again)


# ----------------------------------------------------------------------------------------------- embeddings


class Clip:
    """CLIP's two towers: embeddings of unit length. Between rest() and the next image or text it is not on the device."""

    def __init__(self, name, device):
        from transformers import CLIPModel, CLIPProcessor

        self.device = device
        self.model = load_model(_in_fp32(CLIPModel), name, "--clip").to(device).eval().requires_grad_(False)
        self.processor = load_model(CLIPProcessor.from_pretrained, name, "--clip")

    def rest(self):
        """Makes room on the device: CLIP ViT-L/14 takes 1.7 GB."""
        self.model.to("cpu")

    @property
    def size(self):
        """Side of the images that the image tower sees, in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def width(self):
        """Numbers in an embedding."""
        return self.model.config.projection_dim

    def images(self, images):
        """PIL images -> (N, D) float32 on the CPU."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        self.model.to(self.device)
        return _unit_length(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))

    def texts(self, texts):
        """Prompts -> (N, D) float32 on the CPU."""
        tokens = self.processor(text=texts, padding="max_length", return_tensors="pt").to(self.device)
        if tokens["input_ids"].shape[1] > self.model.config.text_config.max_position_embeddings:
            raise InputError("metadata.csv", f"a text is too long for CLIP, one of {texts}", "shorten it")
        self.model.to(self.device)
        return _unit_length(self.model.text_projection(self.model.text_model(**tokens).pooler_output))

    def probabilities(self, images, texts):
        """Zero-shot classification (Radford et al. 2021, section 3.1): the probability of each of M texts for each of N images,
        (N, M) float32, from the embeddings of both."""
        return (self.model.logit_scale.exp().cpu() * torch.as_tensor(images) @ texts.T).softmax(1)


class Encoder:
    """Another image encoder, such as DINOv2: its pooled output, of unit length."""

    def __init__(self, name, device):
        from transformers import AutoImageProcessor, AutoModel

        self.device = device
        self.model = load_model(_in_fp32(AutoModel), name, "--encoder").to(device).eval().requires_grad_(False)
        self.processor = load_model(AutoImageProcessor.from_pretrained, name, "--encoder")
        self.size = self.model.config.image_size

    def images(self, images):
        """PIL images -> (N, D) float32 on the CPU."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        return _unit_length(self.model(pixels).pooler_output)


def _unit_length(embeddings):
    return torch.nn.functional.normalize(embeddings.float(), dim=1).cpu()


def embed_images(encoder, folder, rows, batch, cache):
    """Embeddings of the images of some rows of metadata, (N, D) float32 array. cache: see common/pixels.py."""
    pixels = Pixels(folder, rows, encoder.size, cache)
    batches = imagefolder.progress(torch.arange(len(rows)).split(batch), f"embed {folder}", "batch")
    return torch.cat([encoder.images(list(images)) for images in ahead(pixels.__getitem__, batches)]).numpy()


def save_embeddings(folder, rows, embeddings):
    """Writes folder/embeddings.npz: the file names of some rows of metadata, and their embeddings, (N, D) float32."""
    with open(folder / EMBEDDINGS, "wb") as file:
        np.savez(file, file_name=np.array([row["file_name"] for row in rows]), embedding=embeddings)


def read_embeddings(folder, rows, clip=None):
    """The embeddings of the images of some rows, (N, D) float32 array. Raises InputError if one is missing, or if they cannot
    be those of `clip`, if one is given."""
    path, again = folder / EMBEDDINGS, "run data/embed.py for this --data and --clip"
    try:
        with np.load(path) as file:
            embeddings, names = file["embedding"], {name: i for i, name in enumerate(file["file_name"].tolist())}
        if embeddings.shape != (len(names), embeddings.shape[-1]) or not np.isfinite(embeddings).all():
            raise ValueError("it does not hold a finite embedding for each file_name")
    except Exception as error:  # a broken file makes numpy raise OSError, ValueError, EOFError, KeyError, BadZipFile, ...
        raise InputError(path, f"cannot be read: {error or type(error).__name__}", again) from None
    missing = [row["file_name"] for row in rows if row["file_name"] not in names]
    if missing:
        raise InputError(path, f"does not contain {len(missing)} of {len(rows)} images, the first is {missing[0]}", again)
    if clip and embeddings.shape[1] != clip.width:
        raise InputError(path, f"holds embeddings of {embeddings.shape[1]} numbers, those of CLIP have {clip.width}", again)
    return embeddings[[names[row["file_name"]] for row in rows]]


def embeddings_digest(folder):
    return files.file_digests(folder, [EMBEDDINGS]) if (folder / EMBEDDINGS).is_file() else None
