# The entries of a hashed lock (second file) for the packages that a requirements file (first file) names.
{ name = tolower($0); sub(/==.*/, "", name); gsub(/[-_.]+/, "-", name) }
/^#/ { next }
NR == FNR { if (/==/) wanted[name] = 1; next }
/==/ { keep = name in wanted; delete wanted[name] }
keep
END { for (name in wanted) { print "no hash of " name > "/dev/stderr"; missing = 1 } exit missing }
