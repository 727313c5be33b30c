"""Calls a trunk by TLS, showing no certificate unless one is named: `knock.py HOST:PORT CA [CERTIFICATE KEY]`.

Ends with 0 where the trunk then speaks, and with 1 where it hangs up.
"""

import socket
import ssl
import sys

address, authority, *own = sys.argv[1:]
host, _, port = address.rpartition(":")
trust = ssl.create_default_context(cafile=authority)
trust.set_alpn_protocols(["h2"])
if own:
    trust.load_cert_chain(*own)
with socket.create_connection((host, int(port)), timeout=30) as plain:
    with trust.wrap_socket(plain, server_hostname=host) as connection:
        # What a server makes of a missing certificate it shows only after its own half of the handshake.
        if not connection.recv(1):
            sys.exit("the trunk hung up")
