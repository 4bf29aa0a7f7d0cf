"""Settings of a client: `device.toml`, every one also a flag."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgetrain.edge_client.host.policy import PolicyConfig
from edgetrain.edge_client.privacy.sample_budget import DevicePrivacy
from edgetrain.protocol.transport.mqtt import BrokerConfig


class SecureAggregationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[secure_aggregation]: what this client asks of it."""

    required: Annotated[
        bool, Meta(description="send updates in secure aggregation only: decline every plan without it")
    ] = False
    least_clients: Annotated[int, Meta(description="decline secure aggregation with fewer clients than this", ge=2)] = 3
    max_colluding: Annotated[
        float,
        Meta(
            description="decline neighbourhoods too small for this share of the clients colluding with the "
            "coordinator, whatever that says",
            ge=0,
            lt=0.5,
        ),
    ] = 0.0
    least_noise: Annotated[
        float,
        Meta(
            description="decline sums with less noise than this, in noise multipliers: whoever runs the coordinator "
            "cannot leave it out",
            ge=0,
        ),
    ] = 0.0
    epsilon: Annotated[
        float,
        Meta(
            description="largest epsilon that all noisy sums this client is in may ever cost it, by its own count; 0 "
            "for no limit",
            ge=0,
        ),
    ] = 0.0
    delta: Annotated[float, Meta(description="delta of that budget, well below 1 / number of clients", gt=0, lt=1)] = (
        1e-6
    )
    enrolled: Annotated[
        str,
        Meta(
            description="file with the clients that may take part, a name and its Ed25519 public key in hex on each "
            "line; without it and `authority` the coordinator's word counts"
        ),
    ] = ""
    authority: Annotated[
        str,
        Meta(
            description="public key of the federation's CA in hex, as in a device file: take part only with clients "
            "that it has enrolled",
            pattern="^([0-9a-f]{66})?$",
        ),
    ] = ""


class ClientConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. The descriptions are the flags' help texts."""

    name: Annotated[str, Meta(description="this client's name, unique in the federation")]
    federation: Annotated[str, Meta(description="name of the federation to join")]
    data: Annotated[str, Meta(description="local data: an .npz, a .csv, or file.py:callable")]
    state: Annotated[
        str, Meta(description="directory for this client's key, bundles and residual [default: ./state-NAME]")
    ] = ""
    runtime: Annotated[
        str, Meta(description="runtime to train on [default: the first of the bundle's that is here]")
    ] = ""
    threads: Annotated[int, Meta(description="threads of one training step; 0 lets the runtime choose", ge=0)] = 1
    validation_fraction: Annotated[
        float, Meta(description="share of the local data kept for validation", ge=0, lt=1)
    ] = 0.1
    coordinator_key: Annotated[
        str,
        Meta(
            description="the coordinator's public key in hex; without it the first one seen is trusted and remembered"
        ),
    ] = ""
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"],
        Meta(description="arithmetic of matrix products and convolutions; 16 bits on the runtime torch only"),
    ] = "fp32"
    feature_cache: Annotated[
        Literal["float16", "int8", "float32", "off"],
        Meta(description="how the outputs of the frozen part are kept on disk, so that it runs once per sample"),
    ] = "float16"
    max_feature_cache_bytes: Annotated[int, Meta(description="most bytes of kept features", ge=0)] = 1 << 30
    signing_key: Annotated[
        str,
        Meta(
            description="file with the key that signs this client's messages; a device file holds the key itself "
            "[default: one made in the state directory]"
        ),
    ] = ""
    enrolment: Annotated[
        str,
        Meta(
            description="the CA's signature of this client's name and key in hex, as in a device file",
            pattern="^([0-9a-f]{128})?$",
        ),
    ] = ""
    exit_when_done: Annotated[bool, Meta(description="leave when the run ends, instead of waiting for the next")] = True
    leave_when_idle: Annotated[
        bool, Meta(description="disconnect when the coordinator says that it needs nothing for a while")
    ] = True
    max_bundle_bytes: Annotated[int, Meta(description="refuse bundles that need more bytes", ge=1)] = 1 << 30
    policy: PolicyConfig = PolicyConfig()
    privacy: DevicePrivacy = DevicePrivacy()
    broker: BrokerConfig = BrokerConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()

    def __repr__(self) -> str:
        """Without keys: this may end in a log."""
        return f"ClientConfig(name={self.name!r}, federation={self.federation!r}, broker={self.broker!r})"
