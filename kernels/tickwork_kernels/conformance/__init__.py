"""Checks that an implementation of an operation must pass; they need torch only.

Each module's ``checks()`` returns ``(name, check)`` pairs; ``check(name of an implementation, device)`` raises an
AssertionError that says what is wrong, or returns why it does not apply, or None.
"""
