"""How long does the update itself take: beside its peers, as it grows, at the end of a round, and for the host?"""
