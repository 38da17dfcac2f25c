"""Differential privacy: clipping, noise, who sees what, what it costs, and where that is written down.

    update -> clipping.py (sensitivity) -> noise.py -> masks.py, secagg.py (only the sum is opened) -> the model
              plan.py: how much noise     mechanisms.py: who adds it, and what each adversary sees of it
              accounting.py: what that costs     ledger.py: what was spent, written ahead

The unit is one client with all its rows over the whole run. Two populations are neighbours if one client is replaced
by one that sends a null update and still adds its noise (zero-out adjacency).
"""
