"""Taking the masks off the sum: the coordinator's last and dearest step.

For every survivor its own mask, for everyone who dropped out after sharing the masks with its surviving
neighbours. With n clients, k neighbours and a share d of them dropped out, that is about n (1 - d) + n d (1 - d) k
expansions of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgetrain.protocol.errors import SecureAggregationError
from edgetrain.protocol.secure_aggregation import keys
from edgetrain.protocol.secure_aggregation.masks import Masker, Words
from edgetrain.protocol.secure_aggregation.messages import pieces
from edgetrain.protocol.secure_aggregation.server import Server, needed_secrets
from edgetrain.protocol.secure_aggregation.shamir import SHARE_BYTES, combine


def unmask(server: Server, total: Words) -> Words:
    """The sum of the survivors' vectors.

    Args:
        server: with enough revealed.
        total: sum of the masked vectors of exactly those that survived, [layout.length].

    Raises:
        SecureAggregationError: a secret cannot be put together: too few shares, or wrong ones. Then there is no sum.
    """
    cast = server.cast
    peers, layout = cast.roster.peers, cast.layout
    masker = Masker(layout.length, layout.bits)
    result = total.copy()
    given = _by_owner(server)
    for client in needed_secrets(server):
        if client in server.masked:
            seed = recover(given[client], cast.roster.threshold, _is_committed(server.shares[client].commitment))
            if seed is None:
                raise SecureAggregationError(f"the seed of {peers[client].name} cannot be put together")
            masker.subtract(result, seed)
            continue
        own = peers[client].mask_key
        private = recover(given[client], cast.roster.threshold, _is_private_of(own))
        if private is None:
            raise SecureAggregationError(f"the mask key of {peers[client].name} cannot be put together")
        for neighbour in cast.graph.neighbours(client):
            if neighbour not in server.masked:
                continue
            common = keys.mask_key(private, own, peers[neighbour].mask_key, server.session)
            # As the survivor did, with the opposite sign.
            if neighbour < client:
                masker.subtract(result, common)
            else:
                masker.add(result, common)
    return result


def recover(shares: Sequence[tuple[int, bytes]], threshold: int, is_right: Callable[[bytes], bool]) -> bytes | None:
    """The secret, or None if no `threshold` shares in a row (the first follows the last) give it.

    With one share more than the threshold, any one of them may be wrong.

    Args:
        shares: (point, share).
        threshold: of the secret.
        is_right: whether this is the secret.
    """
    for start in range(len(shares) if len(shares) >= threshold else 0):
        chosen = [*shares[start:], *shares[:start]][:threshold]
        try:
            secret = combine([point for point, _ in chosen], [share for _, share in chosen])
        except SecureAggregationError:
            continue
        if is_right(secret):
            return secret
    return None


def _by_owner(server: Server) -> dict[int, list[tuple[int, bytes]]]:
    """The revealed shares by whose secret they are of."""
    given: dict[int, list[tuple[int, bytes]]] = {client: [] for client in server.present}
    for giver, reveal in sorted(server.reveals.items()):
        owners = [holder for holder in server.cast.graph.holders(giver) if holder in server.present]
        for owner, share in zip(owners, pieces(reveal.shares, SHARE_BYTES, len(owners)), strict=True):
            if any(share):
                given[owner].append((giver + 1, share))
    return given


def _is_committed(commitment: bytes) -> Callable[[bytes], bool]:
    return lambda seed: keys.commitment(seed) == commitment


def _is_private_of(public: bytes) -> Callable[[bytes], bool]:
    return lambda private: keys.public_key(private) == public
