"""Checks that an implementation of an operation must pass; they need torch only."""
