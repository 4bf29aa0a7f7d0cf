"""Secure aggregation: the coordinator learns the sum of the updates, and nothing else.

Bonawitz et al., CCS 2017; Bell et al., CCS 2020. Pure: no network, no clock, no disk; randomness and signatures are
passed in. `member` and `server` are the two sides, `messages` what they say, `arithmetic` what is summed and why it
cannot overflow. `docs/secure-aggregation.md` describes every byte.
"""
