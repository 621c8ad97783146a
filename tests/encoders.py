"""Encoders that count what they encode, and helpers for a store's entries."""

import torch


class Vae:
    """A counting encoder: means of 8 x 8 pixels for each color, and their mean as a 4th channel."""

    def __init__(self):
        self.made = self.encoded = 0
        self.spoiled = None  # number of the picture that gets a non-finite latent

    def make(self):
        self.made += 1
        return self

    def __call__(self, pixels):
        self.encoded += 1
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        latent = torch.cat([means, means.mean(dim=0, keepdim=True)])
        return latent * (float("nan") if self.encoded == self.spoiled else 1)


class Clip:
    def __init__(self):
        self.captions = []
        self.calls = 0

    def make(self):
        return self

    def __call__(self, captions):
        self.calls += 1
        self.captions += captions
        rows = [torch.full((3, 4), float(len(caption))) for caption in captions]
        return [{"prompt": row, "pooled": row[0]} for row in rows]


def entries(cache, kind="latents"):
    return sorted((cache / kind).rglob("*.safetensors"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])
