"""The version of this code, which each process tells the others."""

VERSION = "0.1.0"
