"""Bad inputs by the thousand, each through a command's main: python -m tests.fuzz."""
