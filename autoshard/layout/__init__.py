"""What a LayoutMap can say: rules, matched as Keras does, and the layouts they stand for."""
