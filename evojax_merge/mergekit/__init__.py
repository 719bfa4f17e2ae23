"""Everything that speaks mergekit: recipes in (schema, plan, execute) and out (write), and mergekit-evolve's configs."""
