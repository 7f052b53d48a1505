#!/bin/sh
# Prints the Debian archive that this machine's own apt sources name, in either format of apt's sources; nothing
# when they name none.
{
    sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null || :
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        awk '$1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /^[a-z+]+:/) { print $i; break } }' || :
} | tr ' ' '\n' | grep -E '/debian/?$' | head -n 1
