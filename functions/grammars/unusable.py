"""What is said of a grammar that cannot be followed."""


class UnusableGrammar(Exception):
    """It does not compile, is too large, or allows nothing. The message says where, without what was generated so far."""
