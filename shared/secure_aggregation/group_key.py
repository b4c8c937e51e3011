"""A key among the clients, so that the server adds up what it cannot read: not even the sum.

How they come to share it is not this module's: in a job it is a file (shared/group_keys.py). One key serves many
sums, as each sum's mask follows from its view. In a sum every contributor adds the same mask G on top, the server
gives back the masked sum with the number m of those in it, and whoever has the key takes m G off.

m G alone would show something: if 2^j divides m, so do all its words, and the low j bits of the sum would be in the
clear. Hence the encoding keeps all data in multiples of 2^s with 2^s >= clients >= m (fixed_point.py): modulo 2^j
nothing of them is left, and data + m G is uniform over the multiples of 2^j whatever the data are.

One member that helps the server gives it the sum, and whoever gets the key can read its earlier sums if he has the
words. A server that lies about m, or a client with another key, spoils the sum and learns nothing.
"""

from dataclasses import dataclass, field

from shared.errors import SchemaError
from shared.secure_aggregation import keys
from shared.secure_aggregation.fixed_point import Floats, Words
from shared.secure_aggregation.masks import Mask, add_masks
from shared.secure_aggregation.messages import GroupSum
from shared.secure_aggregation.terms import SumTerms


@dataclass(frozen=True)
class GroupKey:
    """What all members have, 32 bytes."""

    seed: bytes = field(repr=False)

    def mask(self, view: bytes) -> Mask:
        """What each contributor adds in the sum of this view (32 bytes; it must be another in every sum)."""
        return Mask(keys.derive(self.seed, "group mask", view))

    def open_sum(self, message: GroupSum, words: Words, terms: SumTerms, view: bytes) -> tuple[Floats, int]:
        """The mean, float32 (L,), and the total weight; `words` (L + 1,) change in place.

        Raises SchemaError for another number of words or more contributors than members, and AggregationError if the
        words are no such sum.
        """
        if message.contributors > len(terms.members) or not len(words) == message.words == terms.length + 1:
            raise SchemaError("a sum of more clients than there are, or of another length")
        add_masks(words, [Mask(self.mask(view).key, -message.contributors)])
        return terms.encoding.mean(words, message.contributors)
