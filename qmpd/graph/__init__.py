"""Which node sits on which: nodes, permissions, transactions, chains. Changed on the control thread only."""
