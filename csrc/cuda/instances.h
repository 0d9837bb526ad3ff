// The one table of kernel instances, by storage dtype (16 bits: narrow, float32: wide) and padded hidden size: 35 forwards
// (narrow ones for tiles of 16 and of 8 rows) and 21 backwards, and sum_readers for each dtype. Tests and reports compile
// one size: -DDIEN_ONLY=64.
#pragma once

#ifdef DIEN_ONLY
#define DIEN_FORWARD_NARROW(X) X(DIEN_ONLY)
#define DIEN_FORWARD_WIDE(X) X(DIEN_ONLY)
#define DIEN_BACKWARD_NARROW(X) X(DIEN_ONLY)
#define DIEN_BACKWARD_WIDE(X) X(DIEN_ONLY)
#else
#define DIEN_FORWARD_NARROW(X) X(8) X(16) X(32) X(40) X(64) X(112) X(128)
#define DIEN_FORWARD_WIDE(X) X(8) X(16) X(32) X(40) X(64) X(112) X(128)
#define DIEN_BACKWARD_NARROW(X) X(8) X(16) X(32) X(40) X(64) X(112) X(128)
#define DIEN_BACKWARD_WIDE(X) X(8) X(16) X(32) X(40) X(64) X(112) X(128)
#endif
