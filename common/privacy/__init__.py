"""Differential privacy: clipping, noise, secure aggregation, accounting, and the ledger of what was spent.

    update -> clipping.py (sensitivity) -> noise.py -> secagg/ (only the sum is opened) -> the model
              plan.py: how much noise            mechanisms.py: who adds it, and what each adversary sees
              accounting.py: what that costs     ledger.py: what was spent, written before each release

The unit is one client with all its rows over the whole run. Two populations are neighbours if one client is replaced
by one that sends a null update and still adds its noise (zero-out adjacency).
"""
