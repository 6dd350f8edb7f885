"""The command line: thin, each verb calls one function."""
