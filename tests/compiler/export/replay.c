/*
 * Replays a header's tables on two byte arrays, an arena and a backing area, and beside it the same operators with a
 * memory of its own for each buffer. An operator here writes a hash of its inputs, so that one byte read from the
 * wrong place changes every result after it.
 */
#define NET_NAMES
#include "plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned char *arena, *backing, **own;
static unsigned long loaded, stored, streamed;

static void fail(const char *what, unsigned long where) {
    printf("FAULT %s %lu\n", what, where);
    exit(1);
}

static void check_regions(void) {
    unsigned long i, j;
    for (i = 0; i < NET_RESIDENCES; i++) {
        const net_residence_t a = net_residences[i];
        const net_size_t a_end = a.offset + net_buffers[a.buffer].bytes;
        if (a_end > NET_ARENA_BYTES || a.offset % NET_ARENA_ALIGNMENT) fail("region", i);
        for (j = 0; j < i; j++) {
            const net_residence_t b = net_residences[j];
            const net_size_t b_end = b.offset + net_buffers[b.buffer].bytes;
            if (a.begin < b.end && b.begin < a.end && a.offset < b_end && b.offset < a_end) fail("overlap", i);
        }
    }
    for (i = 0; i < NET_BUFFERS; i++)
        for (j = 0; j < i; j++) {
            const net_buffer_t a = net_buffers[i], b = net_buffers[j];
            if (a.backing_offset == NET_NONE || b.backing_offset == NET_NONE) continue;
            if (a.backing_offset < b.backing_offset + b.bytes && b.backing_offset < a.backing_offset + a.bytes)
                fail("backing overlap", i);
        }
}

static unsigned char *planned(const net_operand_t *o) {
    const net_size_t limit = o->place == NET_BACKING ? NET_BACKING_BYTES : NET_ARENA_BYTES;
    if (o->place == NET_NOWHERE) return arena;
    if (o->offset + o->bytes > limit) fail("operand", o->buffer);
    return (o->place == NET_BACKING ? backing : arena) + o->offset;
}

static unsigned long hash_of(unsigned long h, const unsigned char *bytes, net_size_t count) {
    net_size_t i;
    for (i = 0; i < count; i++) h = (h * 31ul + bytes[i] + 7ul) & 0xFFFFFFFFul;
    return h;
}

static void call(const net_call_t *c) {
    const net_operand_t *in = net_operands + c->first_operand, *out = in + c->inputs;
    unsigned long here = c->op, there = c->op, i;
    net_size_t byte;
    for (i = 0; i < c->inputs; i++) {
        here = hash_of(here, planned(&in[i]), in[i].bytes);
        there = hash_of(there, own[in[i].buffer] + in[i].within, in[i].bytes);
        if (in[i].place == NET_BACKING) {
            unsigned long k;
            for (k = 0; k < i; k++) if (in[k].buffer == in[i].buffer) break;
            if (k == i) streamed += net_buffers[in[i].buffer].bytes;
        }
    }
    if (here != there) fail("operator read other bytes", c->op);
    for (i = 0; i < c->outputs; i++)
        for (byte = 0; byte < out[i].bytes; byte++) {
            here = (here * 1103515245ul + 12345ul) & 0xFFFFFFFFul;
            planned(&out[i])[byte] = own[out[i].buffer][out[i].within + byte] = (unsigned char)(here >> 16);
        }
}

static void transfer(const net_transfer_t *t) {
    if (t->bytes != net_buffers[t->buffer].bytes) fail("bytes", t->buffer);
    if (t->backing_offset != net_buffers[t->buffer].backing_offset) fail("backing offset", t->buffer);
    if (t->arena_offset + t->bytes > NET_ARENA_BYTES) fail("transfer", t->buffer);
    if (t->kind == NET_LOAD) {
        memcpy(arena + t->arena_offset, backing + t->backing_offset, t->bytes);
        loaded += t->bytes;
    } else {
        memcpy(backing + t->backing_offset, arena + t->arena_offset, t->bytes);
        stored += t->bytes;
    }
}

int main(void) {
    unsigned long i, calls = 0;
    net_size_t byte;
    check_regions();
    arena = malloc(NET_ARENA_BYTES + 1u);
    backing = malloc(NET_BACKING_BYTES + 1u);
    own = malloc((NET_BUFFERS + 1u) * sizeof *own);
    memset(arena, 0xA5, NET_ARENA_BYTES + 1u);
    memset(backing, 0x5A, NET_BACKING_BYTES + 1u);
    for (i = 0; i < NET_BUFFERS; i++) {
        const net_buffer_t b = net_buffers[i];
        own[i] = malloc(b.bytes + 1u);
        for (byte = 0; byte < b.bytes; byte++) {
            own[i][byte] = (unsigned char)(i * 37u + byte * 11u);
            if (b.backing_offset != NET_NONE) backing[b.backing_offset + byte] = own[i][byte];
        }
    }
    for (i = 0; i < NET_STEPS; i++) {
        const net_instruction_t now = net_instructions[i];
        if (now.kind == NET_RUN || now.kind == NET_RECOMPUTE) {
            if (net_calls[now.index].step != i) fail("step", i);
            call(&net_calls[now.index]);
            calls++;
        } else {
            if (net_transfers[now.index].kind != now.kind || net_transfers[now.index].step != i) fail("step", i);
            if (net_transfers[now.index].before_call != calls) fail("before_call", i);
            transfer(&net_transfers[now.index]);
        }
    }
    printf("%lu %lu %lu", loaded, stored, streamed);
    for (i = 0; i < NET_BUFFERS; i++) {
        const net_buffer_t b = net_buffers[i];
        printf(" %d", b.backing_offset != NET_NONE && !memcmp(backing + b.backing_offset, own[i], b.bytes));
    }
    printf("\n");
    for (i = 0; i < NET_BUFFERS; i++) {
        const char *name;
        for (name = net_buffer_names[i]; *name; name++) printf("%02x", (unsigned)(unsigned char)*name);
        printf("\n");
        free(own[i]);
    }
    free(own);
    free(backing);
    free(arena);
    return (NET_OPERATORS && !net_operator_names[0]) || (NET_OPERATORS && !net_operator_targets[0]);
}
