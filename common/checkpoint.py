"""Checkpoints within a long unit, from which a killed fine-tuning resumes exactly."""

import warnings

from common import files, stage

torch = stage.lazy("torch")


class Checkpoint:
    """A hidden folder from which a killed unit resumes exactly.

    As every random draw is determined by the step, the weights, AdamW's moments and the loss curve are all its state.
    """

    def __init__(self, path, key, weights, optimizer, schedule, ema):
        self.path, self.key, self.weights, self.optimizer = path, key, weights, optimizer
        self.schedule, self.ema = schedule, ema

    def tensors(self):
        """{name: tensor}, live: the weights, their moments and their exponential moving averages."""
        parts = {f"weight.{i}": weight.data for i, weight in enumerate(self.weights)}
        for i, weight in enumerate(self.weights):
            parts |= {f"{name}.{i}": value for name, value in self.optimizer.state[weight].items()}
        return parts | {f"ema.{i}": value for i, value in enumerate(self.ema.shadow_params if self.ema else [])}

    def save(self, curve):
        from safetensors.torch import save_file  # imports torch

        with files.replacing(self.path) as out:
            out.mkdir(parents=True)
            save_file({name: value.contiguous().cpu() for name, value in self.tensors().items()},
                      out / "state.safetensors")
            files.write_csv(out / "loss.csv", curve)
            files.write_json(out / "config.json", {"key": self.key})

    def load(self):
        """Restores everything; returns the loss curve so far, empty if there is no checkpoint."""
        from safetensors.torch import load_file  # imports torch

        if files.read_json(self.path / "config.json").get("key") != self.key:
            files.remove(self.path)
            return []
        saved = load_file(self.path / "state.safetensors")
        for i, weight in enumerate(self.weights):
            self.optimizer.state[weight] = {name: torch.zeros_like(saved[f"{name}.{i}"], device=weight.device)
                                            for name in ("step", "exp_avg", "exp_avg_sq")}
        for name, value in self.tensors().items():
            value.copy_(saved[name])
        curve = [{"step": int(row["step"]), "loss": float(row["loss"]), "learning_rate": float(row["learning_rate"])}
                 for row in files.read_csv(self.path / "loss.csv")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the optimizer has not stepped yet: it has, before
            for _ in curve:
                self.schedule.step()
        if self.ema:
            self.ema.optimization_step = len(curve)
        return curve
