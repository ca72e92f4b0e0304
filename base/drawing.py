"""How a pipeline makes images: from noise, or by editing real ones; and guidance in an interval."""

import inspect

from common import stage

torch = stage.lazy("torch")
# diffusers takes seconds to import, so the functions that need it import it


def draw_images(family, prompt, seeds, guidance, steps):
    """Images drawn from noise, (len(seeds), H, W, 3) float array in [0, 1].

    prompt: encoded, see families.py. An image has a seed of its own, whatever the batch.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return _run(family, prompt, len(seeds), steps, guidance_scale=guidance, output_type="np",
                generator=generators)


def edit_images(family, before, after, paths, steps):
    """Real images made to show another prompt, (len(paths), H, W, 3) float array in [0, 1].

    Each is inverted to noise under the prompt `before`, its own, and drawn from there under the
    prompt `after`, both encoded (DDIM inversion, Song et al. 2021, section 4.3): what the prompts
    differ in changes, the rest hardly does. For models that diffuse; without guidance, with which
    an inversion is inexact.
    """
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    pipe, solver = family.pipe, family.pipe.scheduler
    latents, _ = family.encode_images(family.read_images(paths).to(pipe.vae.device))
    spacing = "trailing" if solver.config.timestep_spacing == "trailing" else "leading"

    def solve(kind, prompt, latents, output):  # the inverse scheduler knows two spacings alone
        pipe.scheduler = kind.from_config(solver.config, clip_sample=False, set_alpha_to_one=False,
                                          timestep_spacing=spacing)
        return _run(family, prompt, len(paths), steps, guidance_scale=1.0, output_type=output,
                    latents=latents)

    noise = solve(DDIMInverseScheduler, before, latents, "latent")
    images = solve(DDIMScheduler, after, noise, "np")
    pipe.scheduler = solver
    return images


def _run(family, prompt, count, steps, **given):
    """What the pipeline returns for `count` times one prompt."""
    prompts = {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in prompt.items()}
    return family.pipe(**prompts, **family.drawing, height=family.size, width=family.size,
                       num_inference_steps=steps, **given).images


def guide_within(interval, family):
    """Guides at noise levels of the interval alone (Kynkäänniemi et al. 2024, section 3).

    interval: of the share of the training timesteps, 0 (an image) to 1 (noise). The pipeline asks
    for two predictions in one batch, without and with the prompt. Outside of the interval the
    second stands for both, so that guidance changes nothing, and only it is computed.
    """
    network, (low, high) = family.network, interval
    signature = inspect.signature(network.forward)

    def second_half(value, count):
        if isinstance(value, dict):
            return {name: second_half(part, count) for name, part in value.items()}
        is_batch = torch.is_tensor(value) and value.ndim and len(value) == count
        return value[count // 2:] if is_batch else value

    def halve(module, args, kwargs):
        given = signature.bind(*args, **kwargs)
        level = family.noise_level(given.arguments["timestep"])
        module.halved = family.pipe.do_classifier_free_guidance and not low <= level <= high
        if module.halved:
            count = len(next(iter(given.arguments.values())))
            for name, value in given.arguments.items():
                given.arguments[name] = second_half(value, count)
        return given.args, given.kwargs

    def double(module, args, output):
        return tuple(part.repeat(2, 1, 1, 1) for part in output) if module.halved else output

    network.register_forward_pre_hook(halve, with_kwargs=True)
    network.register_forward_hook(double)
