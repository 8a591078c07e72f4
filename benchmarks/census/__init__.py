"""The census: every architecture of transformers under every auto class, tiny and random, through the whole flow."""
