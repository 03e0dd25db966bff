"""Analysis of result rows: metrics, tables, paired tests. Polars, no model."""
