"""Families of base models: Stable Diffusion 1.x and 2.x, XL, 3.x, and Sana.

All that differs between them, for fine-tuning and for drawing. A family is a class of a few lines,
chosen by the pipeline class in model_index.json; its prompts are encoded by its own pipeline.
"""

import inspect
from pathlib import Path

from common import imagefolder, models, stage
from common.files import InputError

torch = stage.lazy("torch")
# diffusers takes seconds to import, so the functions that need it import it


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x (Rombach et al. 2022): a UNet and a text encoder."""

    denoiser = "unet"  # the part that is fine-tuned
    lora_layers = ["to_q", "to_k", "to_v", "to_out.0"]  # those of diffusers' script
    options = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    encoded = ("prompt_embeds", "negative_prompt_embeds")  # what its encode_prompt returns
    encoding = {}  # more arguments of it
    drawing = {}  # and of the pipeline itself
    no_negative = None  # what stands for no negative prompt
    learns_text = True  # words can be added, the text encoder fine-tuned

    def __init__(self, pipe):
        self.pipe, self.schedule = pipe, schedule_of(pipe.scheduler)
        self.size = self.network.config.sample_size * pipe.vae_scale_factor  # of images, in pixels

    @property
    def network(self):
        return getattr(self.pipe, self.denoiser)

    def predict(self, noisy, timesteps, prompt):
        """What the network predicts of noisy latents (B, C, h, w) for encoded prompts (B, ...)."""
        return self.network(noisy, timesteps, prompt["prompt_embeds"]).sample

    def read_images(self, paths):
        """Images in the size that the model takes, (N, 3, H, W) uint8."""
        from torchvision.transforms.functional import pil_to_tensor  # takes seconds to import

        images = [imagefolder.load_image(path, self.size) for path in paths]
        return torch.stack([pil_to_tensor(image) for image in images])

    def encode_images(self, pixels):
        """Mean and std of the latents of read_images(), each (N, C, h, w), scaled."""
        vae = self.pipe.vae
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0
        with torch.no_grad():
            found = vae.encode((pixels / 127.5 - 1).to(vae.dtype))
        if hasattr(found, "latent_dist"):
            mean, std = found.latent_dist.mean, found.latent_dist.std
        else:  # Sana's has no posterior
            mean, std = found.latent, torch.zeros_like(found.latent)
        return (mean - shift) * scale, std * scale

    def noise_level(self, timestep):
        """A timestep as the network is given it, in a tensor, as a share of all: 0 to 1."""
        scale = self.network.config.get("timestep_scale", 1)
        return timestep.flatten()[0].item() / scale / self.pipe.scheduler.config.num_train_timesteps

    def parts(self, kind):
        """{name: part} of the pipeline's text encoders or tokenizers."""
        return {name: part for name, part in self.pipe.components.items()
                if name.startswith(kind) and part is not None}

    def check(self, prompt):
        """Raises InputError for a prompt that is too long."""
        for tokenizer in self.parts("tokenizer").values():
            models.check_length(tokenizer, prompt)

    def encode(self, prompt, negative="", guided=False):
        """{argument of the pipeline: tensor (1, ...)} for a prompt and, if guided, a negative one.

        Raises InputError for a prompt that is too long.
        """
        self.check(prompt)
        found = self.pipe.encode_prompt(
            prompt, **self.encoding, device=self.pipe.text_encoder.device, num_images_per_prompt=1,
            do_classifier_free_guidance=guided, negative_prompt=negative or self.no_negative)
        return {name: value for name, value in zip(self.encoded, found) if value is not None}

    def drop_text_encoders(self):
        """Makes room: T5 and Gemma take 5 to 10 GB."""
        for name in self.parts("text_encoder"):
            setattr(self.pipe, name, None)


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL (Podell et al. 2024): pooled embeddings and image sizes are given."""

    options = {"add_watermarker": False}
    encoded = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
               "negative_pooled_prompt_embeds")
    learns_text = False

    def predict(self, noisy, timesteps, prompt):
        embeds = prompt["prompt_embeds"]
        sizes = embeds.new_tensor([self.size, self.size, 0, 0, self.size, self.size])
        given = {"text_embeds": prompt["pooled_prompt_embeds"],
                 "time_ids": sizes.repeat(len(noisy), 1)}
        return self.network(noisy, timesteps, embeds, added_cond_kwargs=given).sample


class StableDiffusion3(StableDiffusion):
    """Stable Diffusion 3.x (Esser et al. 2024): a flow-matching transformer; CLIP twice, T5."""

    denoiser = "transformer"
    lora_layers = [f"attn.{name}" for name in (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
    options = {}
    encoded = StableDiffusionXL.encoded
    encoding = {"prompt_2": None, "prompt_3": None}
    learns_text = False

    def predict(self, noisy, timesteps, prompt):
        return self.network(noisy, prompt["prompt_embeds"], prompt["pooled_prompt_embeds"],
                            timesteps).sample


class Sana(StableDiffusion):
    """Sana (Xie et al. 2025): a linear, flow-matching transformer; Gemma reads prompts."""

    denoiser = "transformer"
    lora_layers = ["to_q", "to_k", "to_v"]
    options = {}
    encoded = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds",
               "negative_prompt_attention_mask")
    drawing = {"use_resolution_binning": False, "negative_prompt": None}
    no_negative = ""
    learns_text = False

    @property
    def encoding(self):  # Gemma is told what to do with a prompt, as when the pipeline is called
        told = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"]
        return {"complex_human_instruction": told.default}

    def predict(self, noisy, timesteps, prompt):
        return self.network(noisy, prompt["prompt_embeds"],
                            timesteps * self.network.config.timestep_scale,
                            encoder_attention_mask=prompt["prompt_attention_mask"]).sample


FAMILIES = {"StableDiffusionPipeline": StableDiffusion, "SanaPipeline": Sana,
            "StableDiffusionXLPipeline": StableDiffusionXL,
            "StableDiffusion3Pipeline": StableDiffusion3}
KNOWN = "Stable Diffusion 1.x, 2.x, XL or 3.x, or Sana"


def load(name, dtype, text=True):
    """The family of a base model, with its pipeline in `dtype`; text: with its text encoders.

    name: a folder in diffusers layout, with fp16 variants or without, a hub id, or a single
    .safetensors file of Stable Diffusion 1.x or 2.x (with a folder of the same name for its configs
    if there is no network). The safety checker is off: a black image is no training image. Pickles
    are never read. Raises InputError for other models.
    """
    import diffusers

    def index_of(name):
        if name.endswith(".safetensors"):
            return "StableDiffusionPipeline", ()
        index = diffusers.DiffusionPipeline.load_config(name)
        return index["_class_name"], index

    kind, parts = models.load_model(index_of, str(name), "--base")
    if kind not in FAMILIES:
        raise InputError(f"--base {name}", f"is a {kind}", f"give {KNOWN}")
    pipeline, options = getattr(diffusers, kind), FAMILIES[kind].options | {"dtype": dtype}
    if not text:
        options |= {part: None for part in parts if part.startswith("text_encoder")}

    def read(name):
        if name.endswith(".safetensors"):
            config = Path(name).with_suffix("")
            more = {"config": str(config)} if config.is_dir() else {}
            return pipeline.from_single_file(name, **options, **more)
        try:
            return pipeline.from_pretrained(name, use_safetensors=True, **options)
        except OSError:
            if not any(Path(name).rglob("*.fp16.safetensors")):
                raise
            return pipeline.from_pretrained(name, use_safetensors=True, variant="fp16", **options)

    pipe = models.load_model(read, str(name), "--base")
    family = FAMILIES[kind](pipe)
    if family.network.config.in_channels != pipe.vae.config.latent_channels:
        raise InputError(f"--base {name}", "is an inpainting model", "give a text-to-image model")
    if kind == "StableDiffusionPipeline" and family.network.config.addition_embed_type:
        raise InputError(f"--base {name}", "is a single file of Stable Diffusion XL",
                         "give a folder in diffusers layout")
    return family


# ------------------------------------------------------------------------------ how noise is added


def schedule_of(scheduler):
    """The Diffusion or the Flow of a pipeline's scheduler. Raises InputError for others."""
    config, kind = scheduler.config, type(scheduler).__name__
    if kind.startswith("EDM"):
        raise InputError("--base", f"adds noise by {kind}, which is not supported", f"give {KNOWN}")
    flows = "FlowMatch" in kind or config.get("prediction_type") == "flow_prediction"
    return Flow(config) if flows else Diffusion(config)


class Diffusion:
    """Noise of DDPM's variances (Ho et al. 2020); the network predicts it, or the velocity."""

    def __init__(self, config):
        from diffusers import DDPMScheduler

        self.ddpm = DDPMScheduler.from_config(config)
        self.velocity = config.prediction_type == "v_prediction"

    def timesteps(self, count, rng):
        steps = self.ddpm.config.num_train_timesteps
        return torch.randint(steps, (count,), generator=rng)

    def noisy(self, latents, noise, timesteps):
        return self.ddpm.add_noise(latents, noise, timesteps)

    def target(self, latents, noise, timesteps):
        return self.ddpm.get_velocity(latents, noise, timesteps) if self.velocity else noise


class Flow:
    """A straight line from the image to noise, whose direction the network predicts.

    Rectified flow with logit-normal times, shifted for large images (Esser et al. 2024, sections 3
    and 5.3.2), as in diffusers' script.
    """

    def __init__(self, config):
        self.steps = config.num_train_timesteps
        self.shift = config.get("shift") or config.get("flow_shift") or 1.0

    def timesteps(self, count, rng):
        level = torch.randn(count, generator=rng).sigmoid()
        return self.steps * self.shift * level / (1 + (self.shift - 1) * level)

    def noisy(self, latents, noise, timesteps):
        level = (timesteps / self.steps)[:, None, None, None]
        return (1 - level) * latents + level * noise

    def target(self, latents, noise, timesteps):
        return noise - latents
