from contract.version import VERSION

__version__ = VERSION
