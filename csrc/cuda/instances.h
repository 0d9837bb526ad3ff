// The one list of padded hidden sizes. For each of them and each storage dtype there is a forward (in 16 bits two, for
// tiles of 16 and of 8 rows) and a backward: 35 and 21 instances, and sum_rows_of_history for each dtype. Tests and
// reports compile one size: -DDIEN_ONLY=64.
#pragma once

#ifdef DIEN_ONLY
#define DIEN_SIZES(X) X(DIEN_ONLY)
#else
#define DIEN_SIZES(X) X(8) X(16) X(32) X(40) X(64) X(112) X(128)
#endif
