"""Attacks on a site's own text, run by the site itself: what could the trunk, or who holds the adapter, find out?

Every attack comes with a control, the same attack run where it must succeed, and with the best guesser that knows all
that the attacker knows but what crossed the wire or was learned. A broken attack would look like privacy; without a
guesser, common words would look like a leak.
"""
