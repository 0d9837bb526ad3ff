// The only list of padded hidden sizes. Each size has, for each storage dtype, a forward (in 16 bits two: forward16 and
// forward8) and a backward. These are 35 and 21 instances; sum_rows_of_history has one for each dtype. Tests and
// reports compile a single size, with -DDIEN_ONLY=64 for example.
#pragma once

#ifdef DIEN_ONLY
#define DIEN_SIZES(X) X(DIEN_ONLY)
#else
#define DIEN_SIZES(X) X(8) X(16) X(32) X(40) X(64) X(112) X(128)
#endif
