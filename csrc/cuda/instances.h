// The one table of kernel instances: 16-row and 8-row forwards and the 16-row backward for each storage dtype and padded
// hidden size. Float32 stops where its weights, in two TF32 parts, no longer fit registers; and has no 8-row forward,
// whose transposes move 16 bits. Tests and reports compile one size: -DDIEN_ONLY=64.
#pragma once

#ifdef DIEN_ONLY
#define DIEN_NARROW_SIZES(X) X(DIEN_ONLY)
#define DIEN_WIDE_SIZES(X) X(DIEN_ONLY)
#else
#define DIEN_NARROW_SIZES(X) X(8) X(16) X(32) X(40) X(64) X(112) X(128)
#define DIEN_WIDE_SIZES(X) X(8) X(16) X(32) X(40) X(64)
#endif
