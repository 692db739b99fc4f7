"""The oracle behind a network: a server, the keys to it, and `RemoteOracle`, its client."""
