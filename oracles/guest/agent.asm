; The agent: our code in a guest of KVM's, which makes each step of a program by real instructions.
;
; It sits in pages of its own, which an entry of each root table that a program uses leads to:
;   BASE + 0x1000  this page, for the supervisor     BASE + 0x4000  GDT
;   BASE + 0x2000  the same page, for the user       BASE + 0x5000  a mailbox for each processor,
;   BASE + 0x3000  IDT                                              with its TSS and its stack
; R15 is the mailbox's address. The agent ends a step by OUT, which leaves the guest for the program
; that has it run (server.c); that puts the next step into the mailbox and goes on.
;
; Offsets in the mailbox. In: what RBX and RCX are, and the frame of the IRET that starts the step.
%define ADDRESS 0x08
%define VALUE   0x10
%define RIP_    0x18
%define CS_     0x20
%define FLAGS_  0x28
%define SS_     0x30
; Out: the exception that ended it (3, INT3, if none did), its error code and RIP, CR2 and RAX.
%define VECTOR  0x40
%define ERROR   0x48
%define WHERE   0x50
%define FAULT   0x58
%define DATA    0x60
%define STACK   0x1000

bits 64
org 0
code_page:
agent:
    out 0x10, al
    mov rbx, [r15 + ADDRESS]
    mov rcx, [r15 + VALUE]
    lea rsp, [r15 + STACK]
    lea rax, [r15 + STACK / 2]
    push qword [r15 + SS_]
    push rax
    push qword [r15 + FLAGS_]
    push qword [r15 + CS_]
    push qword [r15 + RIP_]
    xor eax, eax
    mov cr2, rax
    iretq
ended:
    pop qword [r15 + VECTOR]
    pop qword [r15 + ERROR]
    pop qword [r15 + WHERE]
    mov [r15 + DATA], rax
    mov rax, cr2
    mov [r15 + FAULT], rax
    lea rsp, [r15 + STACK]
    push 2
    popfq
    jmp agent

; The steps, 32 bytes apart.
%macro STEP 1
    times 0x100 + 32 * %1 - ($ - code_page) db 0xcc
%endmacro
STEP 0                          ; load
    mov rax, [rbx]
    int3
STEP 1                          ; store
    mov [rbx], rcx
    int3
STEP 2                          ; fetch: what is there ends with INT3
    jmp rbx
STEP 3
    mov cr0, rcx
    int3
STEP 4
    mov cr3, rcx
    int3
STEP 5
    mov cr4, rcx
    int3
STEP 6                          ; EFER
    mov rax, rcx
    mov rdx, rcx
    shr rdx, 32
    mov ecx, 0xC0000080
    wrmsr
    int3
STEP 7
    invlpg [rbx]
    int3

; One entry for each exception, 16 bytes apart: 0 in place of an error code where there is none.
    times 0x400 - ($ - code_page) db 0xcc
%assign vector 0
%rep 32
    align 16, db 0xcc
    %if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
    push byte 0
    %endif
    push byte vector
    jmp near ended
%assign vector vector + 1
%endrep
    times 0x1000 - ($ - code_page) db 0xcc
