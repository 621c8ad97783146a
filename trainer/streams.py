"""Random streams: every kind of draw has its own, so that no two share a number."""

from enum import IntEnum, unique


@unique
class Stream(IntEnum):
    """Goes between the seed and the step in `optim.rng`.  A number once given is never reused."""

    EPOCH = 1  # order of the samples
    NOISE = 2  # of batches; with a seed of their own, of eval points and generated pictures
    TIMESTEP = 3
    DROPOUT = 4  # of captions
    ADAPTER = 5  # initial weights of a LoRA
    CURVATURE = 6  # sampled targets of an estimate
    LAYER_DROPOUT = 7  # of activations, where layers have it
    CAPTION = 20  # which of a picture's captions
    VARIANT = 21  # order and choice of a caption's tags; no seed goes with it
    VIEW = 22  # which crop of a picture, or its mirror image
    OFFSET = 30  # a channel's shift of its noise
    PYRAMID = 31  # coarser levels of noise
    PERTURBATION = 32  # extra noise on the input only
    EMA = 40  # rounding of averaged weights
