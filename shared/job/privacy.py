"""Differential privacy of the updates that clients hand in, by the Gaussian mechanism.

The unit of protection is a client's whole update of a round ("client-level", or "user-level": DP-FedAvg, McMahan et
al., arXiv 1710.06963), neighbouring its update being nothing at all (zero-out). An update is what a client changed in
the round, in all that it hands in, clipped to `clip_norm` in L2. Hidden states and gradients that go to the server are
not covered: docs/privacy.md.
"""

from typing import Annotated, Literal

from pydantic import Field

from shared.job.settings import Settings

# Outside of these, noise is none or a model is nothing but noise, and the accounting's arithmetic ends.
NoiseMultiplier = Annotated[float, Field(ge=1e-6, le=1e3)]
Delta = Annotated[float, Field(ge=1e-15, le=0.1)]


class NoPrivacy(Settings):
    type: Literal["none"] = "none"


class GaussianPrivacy(Settings):
    """What both kinds share. `noise_multiplier`: the noise's standard deviation over the sensitivity. `delta`: at which
    epsilon is counted; well under one over the number of clients.
    """

    clip_norm: Annotated[float, Field(ge=1e-9, le=1e9)]
    noise_multiplier: NoiseMultiplier
    delta: Delta


class CentralPrivacy(GaussianPrivacy):
    """The server adds noise of standard deviation noise_multiplier x clip_norm / n to the mean of n updates, once."""

    type: Literal["central"] = "central"


class LocalPrivacy(GaussianPrivacy):
    """Each client adds noise of standard deviation noise_multiplier x clip_norm to its update before it leaves."""

    type: Literal["local"] = "local"


Privacy = Annotated[NoPrivacy | CentralPrivacy | LocalPrivacy, Field(discriminator="type")]
