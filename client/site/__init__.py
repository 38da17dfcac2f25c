"""A site: its file, its data, its policy, its ledger."""
