"""What travels for a secure sum, in the order of the phases; clients are numbers, their places in the terms' members.

    client                                    server
    ------                                    ------
    AdvertiseKeys    two fresh public keys
                                              KeyList          everybody's
    ShareKeys        sealed shares, commitments
                                              RelayedShares    those sealed for this client
    MaskedInput      + one frame of words
                                              UnmaskRequest    whose masks to help remove
    Unmask           shares of those
                                              GroupSum         + one frame of words (under a group key)

    a ring:          RingKey ↔ RingKeys once, then RingRound and RingInput + one frame of words

The sender of a message is known from its session; none of them says it. Words are uint32 or uint64, little-endian.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from shared.payload.schema import Count, Message
from shared.secure_aggregation.keys import TAG_BYTES
from shared.secure_aggregation.shamir import SHARE_BYTES
from shared.secure_aggregation.terms import MAX_CLIENTS

SHARES_BOX_BYTES = 2 * SHARE_BYTES + TAG_BYTES

ClientNumber = Annotated[int, Field(ge=0, lt=MAX_CLIENTS)]
Clients = Annotated[tuple[ClientNumber, ...], Field(max_length=MAX_CLIENTS)]
Key = Annotated[bytes, Field(min_length=32, max_length=32)]
Commitment = Annotated[bytes, Field(min_length=32, max_length=32)]


class AdvertiseKeys(Message):
    """Two X25519 public keys made for this sum: `sealing` for what clients send each other, `masking` for masks."""

    type: Literal["advertise_keys"] = "advertise_keys"
    sealing: Key
    masking: Key


class ClientKeys(Message):
    client: ClientNumber
    sealing: Key
    masking: Key


class KeyList(Message):
    """All advertised keys, by ascending number; the same for everybody."""

    type: Literal["key_list"] = "key_list"
    keys: Annotated[tuple[ClientKeys, ...], Field(max_length=MAX_CLIENTS)]


class SealedShares(Message):
    """A share of the self-mask's seed and one of the masking key, sealed; a commitment to each.

    `client` is for whom (in ShareKeys) or from whom (in RelayedShares).
    """

    client: ClientNumber
    box: Annotated[bytes, Field(min_length=SHARES_BOX_BYTES, max_length=SHARES_BOX_BYTES)]
    self_commitment: Commitment
    key_commitment: Commitment


class ShareKeys(Message):
    """One box for each neighbour, and a commitment to the self-mask's seed."""

    type: Literal["share_keys"] = "share_keys"
    seed_commitment: Commitment
    shares: Annotated[tuple[SealedShares, ...], Field(max_length=MAX_CLIENTS)]


class RelayedShares(Message):
    """The boxes that neighbours made for this client."""

    type: Literal["relayed_shares"] = "relayed_shares"
    shares: Annotated[tuple[SealedShares, ...], Field(max_length=MAX_CLIENTS)]


class MaskedInput(Message):
    """A frame of `words` words follows."""

    type: Literal["masked_input"] = "masked_input"
    words: Count


class UnmaskRequest(Message):
    """Everybody whose input is in the sum; of this client's neighbours, who shared keys and then dropped out."""

    type: Literal["unmask_request"] = "unmask_request"
    summed: Clients
    dropped: Clients


class Share(Message):
    client: ClientNumber
    share: Annotated[bytes, Field(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]


class Unmask(Message):
    """A share of the self-mask's seed of each client summed, and of the masking key of each that dropped out."""

    type: Literal["unmask"] = "unmask"
    self_shares: Annotated[tuple[Share, ...], Field(max_length=MAX_CLIENTS)]
    key_shares: Annotated[tuple[Share, ...], Field(max_length=MAX_CLIENTS)]


class GroupSum(Message):
    """The sum of so many clients' inputs under the group's mask; a frame of `words` words follows."""

    type: Literal["group_sum"] = "group_sum"
    contributors: Annotated[int, Field(ge=1, le=MAX_CLIENTS)]
    words: Count


class RingKey(Message):
    type: Literal["ring_key"] = "ring_key"
    key: Key


class PublicKey(Message):
    client: ClientNumber
    key: Key


class RingKeys(Message):
    """All members' keys, by ascending number."""

    type: Literal["ring_keys"] = "ring_keys"
    keys: Annotated[tuple[PublicKey, ...], Field(max_length=MAX_CLIENTS)]


class RingRound(Message):
    """Sum number `sequence` is of `members`, ascending. A number is used once, also if the sum comes to nothing."""

    type: Literal["ring_round"] = "ring_round"
    sequence: Count
    members: Clients


class RingInput(Message):
    """For sum `sequence`; a frame of `words` words follows."""

    type: Literal["ring_input"] = "ring_input"
    sequence: Count
    words: Count


FromClient = AdvertiseKeys | ShareKeys | MaskedInput | Unmask | RingKey | RingInput
FromServer = KeyList | RelayedShares | UnmaskRequest | GroupSum | RingKeys | RingRound

CLIENT_MESSAGES: TypeAdapter[FromClient] = TypeAdapter(Annotated[FromClient, Field(discriminator="type")])
SERVER_MESSAGES: TypeAdapter[FromServer] = TypeAdapter(Annotated[FromServer, Field(discriminator="type")])
