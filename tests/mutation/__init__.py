"""The field's bugs, as mutations of this project's code, each killed by a test of the ordinary suite."""
