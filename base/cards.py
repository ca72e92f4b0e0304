"""Cards (README.md) for what may be uploaded to the Hugging Face Hub: images, and weights."""

import json

from base.weights import LORA_FILE
from common import files, imagefolder

LIMITS = """\
Made to train classifiers that do not rely on a spurious correlation. The images repeat what the
base model and the training images get wrong, and a model of few images may copy some of them:
compare before you publish. Not made for identifying or judging people, nor as evidence of anything.
The license is yours to state: it depends on the base model's and on the training images'.
"""


def save(path, settings, text):
    """Writes a card: settings for the Hub, each a string, a list or a dict, then text."""
    head = [f"{name}: {json.dumps(value, ensure_ascii=False)}\n"  # JSON is YAML, too
            for name, value in settings.items()]
    files.write_text(path, f"---\n{''.join(head)}---\n\n{text}\n\n{LIMITS.rstrip()}")


def of_images(path, rows, args):
    """The card of a folder of synthetic images; rows: of its metadata; args: of generate.py."""
    titles, counts = imagefolder.group_titles(rows), imagefolder.group_counts(rows)
    prompts = [f"`{prompt}`" for prompt in sorted({row["prompt"] for row in rows})]
    table = "".join(f"| {titles[group]} | {count} |\n" for group, count in counts.items())
    tuned = ", fine-tuned" if args.models else ""
    how = (f"Real training images, edited by {args.base}{tuned} (column `edited`; those of common "
           "groups are hardly changed)" if args.edit else f"Drawn by {args.base}{tuned}")
    settings = {"license": "unknown", "task_categories": ["image-classification"],
                "tags": ["synthetic", "imagefolder"]}
    save(path, settings, f"""\
# {len(rows)} synthetic images in {len(counts)} groups

{how}, {args.steps} steps, guidance scale {args.guidance_scale:g}; filtered
with CLIP ({args.clip}, --keep {args.keep:g}). metadata.csv holds class `y`,
attribute `a`, prompt, unit, CLIP score and seed of each image, config.json arguments and versions.

| group | images |
| --- | --- |
{table}
Prompts: {"; ".join(prompts[:20])}{"; ..." * (len(prompts) > 20)}""")


def of_weights(path, unit, family, args):
    """The card of fine-tuned weights; unit: see finetune.Unit; args: of finetune.py."""
    prompts = sorted(set(unit.images.prompts))[:3]
    prior = ", with prior preservation" if unit.prior else ""
    denoiser, kind = family.denoiser, type(family.network).__name__
    load = f'pipe.{denoiser} = {kind}.from_pretrained("<this folder>", subfolder="{denoiser}")'
    if args.method == "lora":
        load = f'pipe.load_lora_weights("<this folder>", weight_name="{LORA_FILE}")'
    settings = {"license": "unknown", "base_model": str(args.base), "library_name": "diffusers",
                "tags": ["text-to-image", "diffusers", args.method],
                "instance_prompt": prompts[0], "widget": [{"text": prompt} for prompt in prompts]}
    save(path, settings, f"""\
# {unit.title}

{args.base}, fine-tuned with {args.method} on {len(unit.rows)} images: {args.steps} steps of
{args.batch}, learning rate {args.learning_rate:g}{prior}. Prompt:
{", ".join(f"`{prompt}`" for prompt in prompts)}.

    pipe = {type(family.pipe).__name__}.from_pretrained("{args.base}")
    {load}""")
