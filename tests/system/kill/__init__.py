"""Runs that are killed (SIGKILL, which nothing can catch) and started again, against runs that are left alone."""
