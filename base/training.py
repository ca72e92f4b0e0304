"""What finetune.py trains: a base model, the images that it sees, and checkpoints."""

import functools
import warnings

from base import families, weights
from common import files, imagefolder, stage
from common.pixels import ahead

torch = stage.lazy("torch")


class Base:
    """A base model for training: its family and pipeline, what it encodes, and learned words.

    On a GPU the VAE and the text encoders are there only while they are needed.
    """

    def __init__(self, name, accelerator, dtype=torch.float32):
        self.name, self.device, self.autocast = name, accelerator.device, accelerator.autocast
        self.bf16, self.dtype = accelerator.mixed_precision == "bf16", dtype
        self.prompts = {}  # {prompt: what its pipeline makes of it}
        self.needs_text = True
        self.load()

    def load(self):
        self.family = families.load(self.name, self.dtype, text=self.needs_text)
        pipe = self.family.pipe
        pipe.vae.float()
        self.vae, self.size = pipe.vae, self.family.size
        self.trained, self.tokens, self.learned = False, [], ()
        for part in (*self.text, self.vae, self.network):
            part.requires_grad_(False)
        self.network.to(self.device)

    @property
    def network(self):
        return self.family.network

    @property
    def text(self):
        """The text encoders that are still there."""
        return list(self.family.parts("text_encoder").values())

    def reset(self, method):
        """Restores the base's own weights, before a unit is trained with lora or dreambooth."""
        if getattr(self.network, "peft_config", None):
            self.network.unload_lora()
        elif method == "dreambooth" and self.trained:
            self.family = None  # makes room
            self.load()
        if method == "lora" and self.bf16:
            self.network.to(torch.bfloat16)  # frozen weights; LoRA's own are in fp32
        if self.family.learns_text:
            self.prompts.clear()
        self.trained = True

    def encode(self, paths):
        """Mean and std of the latents of images, each (N, C, h, w) on the CPU, scaled."""
        batch = min(16, max(1, 16 * 64**2 // self.size**2))  # 16 of 512 pixels would take 10 GB
        batches, moments = [paths[i:i + batch] for i in range(0, len(paths), batch)], []
        self.vae.to(self.device)
        for pixels in ahead(self.family.read_images, batches):
            found = self.family.encode_images(pixels.to(self.device))
            moments.append([part.cpu() for part in found])
        self.vae.to("cpu")
        return [torch.cat(part) for part in zip(*moments)]

    def learn_tokens(self, tokens, word):
        """Adds tokens to the vocabulary; their embeddings begin as those of `word`.

        Returns the embeddings, (len(tokens), D), to be trained (textual inversion, Gal et al.
        2023).
        """
        tokenizer, text_encoder = self.family.pipe.tokenizer, self.family.pipe.text_encoder
        first = len(tokenizer)
        [word], self.tokens = tokenizer(word, add_special_tokens=False).input_ids[:1], tokens
        tokenizer.add_tokens(tokens)
        if len(tokenizer) > text_encoder.get_input_embeddings().num_embeddings:
            text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embedding = text_encoder.get_input_embeddings().requires_grad_(False)
        beginning = embedding.weight[word].repeat(len(tokens), 1)
        self.learned = torch.nn.Parameter(beginning.to(self.device))

        def with_learned(module, inputs, output):
            number = inputs[0] - first
            is_learned = (number >= 0)[..., None]
            return torch.where(is_learned, self.learned[number.clamp(min=0)], output)

        embedding.register_forward_hook(with_learned)
        return self.learned

    def encode_prompts(self, prompts):
        """Encodes prompts for all units, and drops text encoders that do not learn."""
        if prompts and not self.family.learns_text:
            self.encoded(list(dict.fromkeys(prompts)))
            self.family.drop_text_encoders()
            self.needs_text = False

    def encoded(self, prompts):
        """{name: (len(prompts), ...)}, as the network takes them.

        Computed once per prompt, unless the text learns.
        """
        training = bool(self.tokens) or any(weight.requires_grad for part in self.text
                                            for weight in part.parameters())
        known = {} if training else self.prompts
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for part in self.text if missing else ():
            part.to(self.device)
        for prompt in missing:
            with torch.set_grad_enabled(training):
                known[prompt] = self.family.encode(prompt)
        for part in self.text if missing and not training else ():
            part.to("cpu")
        found = [known[prompt] for prompt in prompts]
        batch = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        return {name: value.to(self.network.dtype) if value.is_floating_point() else value
                for name, value in batch.items()}


class Images:
    """Training images: the moments of their latents, encoded once, and a prompt each.

    seed: of the order in which `steps` batches of `batch` images are taken. balance: from 0
    (as they come) to 1 (all groups equally often).
    """

    def __init__(self, folder, rows, prompts, seed, steps, batch, balance=0.0):
        self.folder, self.rows, self.prompts, self.seed = folder, rows, prompts, seed
        self.steps, self.batch = steps, batch
        sizes = imagefolder.group_counts(rows)
        groups = [imagefolder.group_of(row) for row in rows]
        self.weights = torch.tensor([sizes[group] ** -balance for group in groups])
        self.balanced = balance > 0 and len(sizes) > 1

    @functools.cached_property
    def drawn(self):
        """{index: row} of the images that the steps see: 800 steps see 800 of 70,000."""
        if self.balanced:
            picks = [self.pick(step, self.batch) for step in range(self.steps)]
        else:
            picks = [self.pick(0, min(self.steps * self.batch, len(self.rows)))]
        return {index: self.rows[index] for index in sorted({i for pick in picks for i in pick})}

    def encode(self, base):
        paths = [self.folder / row["file_name"] for row in self.drawn.values()]
        self.mean, self.std = base.encode(paths)
        self.place = {index: place for place, index in enumerate(self.drawn)}

    def pick(self, step, batch):
        """Indices of a step's images. Each epoch takes all images in an order of its own.

        With a balance, an image is drawn with weight (1 / size of its group) ** balance.
        """
        if self.balanced:
            rng = torch.Generator().manual_seed(stage.seed_of(self.seed, "step", step))
            return torch.multinomial(self.weights, batch, replacement=True, generator=rng).tolist()
        count, indices = len(self.rows), []
        for position in range(step * batch, (step + 1) * batch):
            epoch, index = divmod(position, count)
            if index == 0 or not indices:
                rng = torch.Generator().manual_seed(stage.seed_of(self.seed, epoch))
                order = torch.randperm(count, generator=rng)
            indices.append(order[index].item())
        return indices

    def latents(self, indices, rng):
        """Latents sampled from the VAE's posterior, (len(indices), C, h, w)."""
        places = [self.place[index] for index in indices]
        mean, std = self.mean[places], self.std[places]
        return mean + std * torch.randn(mean.shape, generator=rng)


class Checkpoint:
    """A hidden folder from which a killed unit resumes exactly.

    As every random draw is determined by the step, the weights, AdamW's moments and the loss
    curve are all its state.
    """

    def __init__(self, path, key, weights, optimizer, schedule):
        self.path, self.key, self.weights, self.optimizer = path, key, weights, optimizer
        self.schedule = schedule

    def tensors(self):
        """{name: tensor}, live: the weights and their moments."""
        found = {}
        for i, weight in enumerate(self.weights):
            moments = self.optimizer.state[weight].items()
            found[f"weight.{i}"] = weight.data
            found |= {f"{name}.{i}": value for name, value in moments}
        return found

    def save(self, curve):
        from safetensors.torch import save_file

        tensors = {name: value.contiguous().cpu() for name, value in self.tensors().items()}
        with files.replacing(self.path) as out:
            out.mkdir(parents=True)
            save_file(tensors, out / "state.safetensors")
            files.write_csv(out / "loss.csv", curve)
            files.write_json(out / "config.json", {"key": self.key})

    def load(self):
        """Restores everything; returns the loss curve so far, [] if there is no checkpoint."""
        from safetensors.torch import load_file

        if files.read_json(self.path / "config.json").get("key") != self.key:
            files.remove(self.path)
            return []
        saved = load_file(self.path / "state.safetensors")
        for i, weight in enumerate(self.weights):
            # Fused AdamW wants moments in the memory format of their weight.
            self.optimizer.state[weight] = {
                "step": torch.zeros((), device=weight.device),
                "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        for name, value in self.tensors().items():
            value.copy_(saved[name])
        curve = [{"step": int(row["step"]), "loss": float(row["loss"]),
                  "learning_rate": float(row["learning_rate"])}
                 for row in files.read_csv(self.path / "loss.csv")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch thinks that the optimizer has not stepped yet
            for _ in curve:
                self.schedule.step()
        return curve


def merged_groups(unit, above, texts):
    """{(y, a): a of the group that it is drawn with}, for groups whose learned words are alike.

    By single linkage of the cosine distances of their embeddings, within each class (SAGE, Luo et
    al. 2026); above: the least cosine similarity; 1: none. texts: {(y, a): caption}; groups of
    different captions stay apart.
    """
    if above == 1:
        return {}
    from sklearn.cluster import AgglomerativeClustering  # slow to import

    merged, words = {}, weights.read_tokens(unit)
    linkage = AgglomerativeClustering(None, metric="cosine", linkage="single",
                                      distance_threshold=1 - above)
    groups = sorted(imagefolder.labels_of(word.strip("<>")) for word in words)
    for y, text in sorted({(y, texts[y, a]) for y, a in groups}):
        mine = [a for other, a in groups if other == y and texts[y, a] == text]
        if len(mine) > 1:
            embeddings = [words[f"<{imagefolder.group_name(y, a)}>"] for a in mine]
            labels = linkage.fit_predict(embeddings).tolist()
            merged |= {(y, a): mine[labels.index(label)] for a, label in zip(mine, labels)
                       if labels.count(label) > 1}
    return merged
