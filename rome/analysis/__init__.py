"""What result rows say: metrics, tables, paired tests. Polars, no model."""
