"""`pipeline estimate`: what both stages will take, before either runs."""
