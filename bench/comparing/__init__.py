"""Is today's build slower than yesterday's: two files of records, row by row, with the noise taken into account."""
