"""The images that a diffusion model is trained on: their latents, their prompts, and which of them a step sees."""

import functools

from common import imagefolder, stage

torch = stage.lazy("torch")


class Images:
    """Images as the diffusion model sees them: the moments of their latents, encoded once, and a prompt each."""

    def __init__(self, folder, rows, prompts, seed, args, balance=0.0):
        sizes = imagefolder.group_counts(rows)
        self.weights = torch.tensor([sizes[imagefolder.group_of(row)] ** -balance for row in rows])
        self.folder, self.rows, self.prompts, self.seed, self.args = folder, rows, prompts, seed, args
        self.balanced = balance > 0 and len(sizes) > 1

    @functools.cached_property
    def drawn(self):
        """{index: row} of the images that the steps draw, by index: 800 steps of one draw 800 of 70,000."""
        steps, batch = self.args.steps * self.args.accumulation, self.args.batch
        picks = [self.pick(step, batch) for step in range(steps)] if self.balanced else [
            self.pick(0, min(steps * batch, len(self.rows)))]
        return {index: self.rows[index] for index in sorted({index for pick in picks for index in pick})}

    def encode(self, base):
        self.mean, self.std = base.encode([self.folder / row["file_name"] for row in self.drawn.values()])
        self.place = {index: place for place, index in enumerate(self.drawn)}

    def pick(self, step, batch):
        """Indices of the images of a step. Each epoch goes through all images in an order of its own.

        With a balance, each image is drawn with weight (1 / size of its group) ** balance: 1 is groups equally often.
        """
        if self.balanced:
            rng = torch.Generator().manual_seed(stage.seed_of(self.seed, "step", step))
            return torch.multinomial(self.weights, batch, replacement=True, generator=rng).tolist()
        count, indices = len(self.prompts), []
        for position in range(step * batch, (step + 1) * batch):
            epoch, index = divmod(position, count)
            if index == 0 or not indices:
                order = torch.randperm(count, generator=torch.Generator().manual_seed(stage.seed_of(self.seed, epoch)))
            indices.append(order[index].item())
        return indices

    def latents(self, indices, rng):
        """Latents sampled from the VAE's posterior, (len(indices), 4, h, w)."""
        mean, std = (moments[[self.place[index] for index in indices]] for moments in (self.mean, self.std))
        return mean + std * torch.randn(mean.shape, generator=rng)
