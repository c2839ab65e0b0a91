"""What tests share: small models and corpora, played servers and clusters, oracles, and ways to break things."""
