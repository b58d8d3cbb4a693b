"""Pure functions that know only torch: sampling, verification, acceptance, losses."""
